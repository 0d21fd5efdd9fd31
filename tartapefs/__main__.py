from tartapefs.cli import main

main()
