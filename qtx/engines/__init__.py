"""What runs a model: the backends by name, the machine, engines from outside."""
