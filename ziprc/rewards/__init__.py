"""Is this answer right? Rule graders, an LLM judge, and the one record that both give."""
