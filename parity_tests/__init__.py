"""The proof that the two backends agree, and that both agree with the outside world."""
