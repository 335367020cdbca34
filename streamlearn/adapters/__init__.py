"""Heavy clients behind the seams of contract/: chosen by the composition root alone."""
