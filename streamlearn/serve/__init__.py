"""Read-only pulls of the embedded registry: OCI Distribution, a Hugging Face Hub facade, and a page for people."""
