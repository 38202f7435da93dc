"""Compare model, training and preprocessing with other libraries on this machine.

suites -> preparation -> measure (a process for each variant) -> compare -> table
"""
