"""The rules of a black box: which of the vocabulary's it follows, each with the input that decides it."""
