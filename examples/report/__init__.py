"""The page about a run: report.md, report.html (one file, readable on a phone) and the pictures, made from what stages left.

folder.py     what is read: results and metrics of finished stages
page.py       what is written: blocks, as markdown and as HTML
plots.py      pictures, one panel each, so that a phone shows one in its width and a desk several
sections/     one file for each part of the story; it appears when its stage has finished
compose.py    the order, the glance at the top, the costs at the end
"""
