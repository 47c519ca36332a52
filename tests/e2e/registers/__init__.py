"""The seven registers of a state. A package of its own name, for a case is called as it is.

Invariant: nothing is done when it is imported.
"""
