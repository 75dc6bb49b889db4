"""Many runs that answer one question: a plan, its jobs, how they are executed, and what they say together."""
