"""Pure: values in, values out. Nothing here opens, waits, logs or looks at a clock."""
