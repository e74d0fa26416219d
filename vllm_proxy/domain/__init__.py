"""Pure values and functions: the configuration, plans, decisions, diagnosis.

Nothing here opens, waits, logs or reads a clock; import-linter forbids the modules that would ("the domain is pure").
"""
