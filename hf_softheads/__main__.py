from hf_softheads.cli import main

if __name__ == "__main__":  # not in processes that multiprocessing spawns
    raise SystemExit(main())
