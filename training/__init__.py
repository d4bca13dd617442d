"""Training of the bundled model: corpus, vocabulary, optimizer, loop, evaluation."""
