"""Several elementwise passes of a GPU as one: what belongs to no backend of sparse products."""
