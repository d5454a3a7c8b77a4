"""``kdcli ablate``: many students over one cache, resumable, one comparison table.

grid (what the file says) → cells (one student each, decided and checked) → runner (a fresh process a cell) → results (table, page).
"""
