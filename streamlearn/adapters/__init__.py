"""The deployed side of the seams: each module passes the suite of the embedded default in contract/."""
