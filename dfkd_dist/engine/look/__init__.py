"""Looking at images as networks see them: distances, balance, contact sheets and maps of features. One process."""
