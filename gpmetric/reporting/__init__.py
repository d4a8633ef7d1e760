"""The page of a result: `gpmetric report campaign.sqlite -o page.html` writes one file that shows it, offline."""
