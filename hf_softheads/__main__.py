from hf_softheads.cli import main

raise SystemExit(main())
