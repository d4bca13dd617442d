"""Training of the bundled models: corpus, vocabulary, optimizer, loop, evaluation."""
