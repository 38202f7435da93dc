"""The model, its training and its preprocessing against other libraries, on the machine at hand.

suites -> preparation -> measure (a process for each variant) -> compare -> table
"""
