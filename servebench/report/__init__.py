"""Words, tables and interchange files made from a judged run; nothing here measures or judges."""
