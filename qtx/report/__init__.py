"""What results look like: tables on the terminal and, with matplotlib, pictures."""
