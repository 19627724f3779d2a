"""Published and older feature files and corpora, converted into feature stores."""
