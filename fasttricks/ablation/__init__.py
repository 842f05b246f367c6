"""The paper's tables and designs over tricks, as runs."""
