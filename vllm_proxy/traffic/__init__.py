"""A request, from the client's bytes to an engine's and back: connections, queues, routing, relaying.

The hot path: nothing is done for each request or event that is not needed. How engines are started is not known here
(import-linter: the ring `traffic`).
"""
