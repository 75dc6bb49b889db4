"""What a run's model can be written as beside a Hugging Face directory, one file a form."""
