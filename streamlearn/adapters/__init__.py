"""The deployed side of the seams: each passes the suite of the embedded default in contract/, and only the composition root chooses it."""
