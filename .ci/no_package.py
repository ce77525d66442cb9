"""What pip calls to build this project, which is no package: its files run where they lie."""

raise SystemExit("no package: pip install -r requirements.txt, and run the programs from here")
