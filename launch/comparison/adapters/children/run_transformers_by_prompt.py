"""As run_transformers.py, but for the order of requests: by prompt length, which is known before.

python run_transformers_by_prompt.py JOB.json RESULT.json
"""

# pyright: reportMissingImports=false, reportImplicitRelativeImport=false

from run_transformers import BY_PROMPT, main

if __name__ == "__main__":
    main(BY_PROMPT)
