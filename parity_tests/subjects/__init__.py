"""Models, inputs and naive forms that the cases use."""
