from arae.cli import main

main()
