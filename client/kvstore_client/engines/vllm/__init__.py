"""vLLM: reads and writes the paged KV memory of its workers."""
