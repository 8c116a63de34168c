"""What the user sees when a run ends: a terminal table, before/after texts, and `report.html`.

Everything is read from the files of a run folder (`files.read_run` lists them), so a report can be made of a
run that is still going or that stopped early: it shows what there is and says what is missing. Top to bottom:

    page                                    report.html
    plots, tables                           its plots; the tables of terminal and Markdown
    texts, files                            which texts to show; what a run folder holds
    results, columns, rows                  an evaluation's rows; how numbers look; what a row of JSON holds
"""
