"""What a run is worth on tasks: fine-tuned on GLUE and SuperGLUE, or asked as it is by lm-evaluation-harness."""
