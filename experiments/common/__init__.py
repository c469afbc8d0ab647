"""What the experiments share: networks, ledgers, points, tables and panels."""
