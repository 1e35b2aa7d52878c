"""Cases that hold the reference to outside truth; they need no torch."""
