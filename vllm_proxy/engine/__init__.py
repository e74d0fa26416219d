"""One vLLM process group, from its options to the end of its last process.

Knows nothing of the fleet: which engines are wanted, and when they start, is decided above (import-linter: the ring
`engine`).
"""
