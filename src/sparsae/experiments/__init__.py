"""Many runs that answer one question: a plan, its units, how they are executed, and what they say together."""
