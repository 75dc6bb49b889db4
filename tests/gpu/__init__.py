"""What only a GPU can show, or one that is simulated: `make test-gpu`."""
