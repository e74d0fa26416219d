"""Makes the running engines match the file: desired state, fleet loop, models, supervisors.

What to do is decided in `domain/decide.py`; how one engine is started and ended is in `engine`.
"""
