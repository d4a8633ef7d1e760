"""What a campaign teaches: which parts of formulas go with good fitness, in figures, in words and on one page of plots.

`gpmetric analyse campaign.sqlite -o page.png`. Source: Dong et al. 2024 (Pruner-Zero), whose analysis of symbols and
masks was made by hand.
"""
