"""``qlora arena``: people compare two replies without knowing whose they are.

``store`` (the votes, in SQLite), ``pairing`` (who is shown what next), ``app`` (the routes),
``report`` (what the votes say), ``command`` (the command line).
"""
