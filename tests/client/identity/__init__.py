"""What may be reused as what: names, the guard around calls, and models that cannot be named."""
