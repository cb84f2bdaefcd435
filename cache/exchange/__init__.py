"""Exchange: captures as files that other tools read, and other tools' files as captures."""
