"""`python -m bulkhead.runtime`."""

import sys

from bulkhead.runtime.main import main

sys.exit(main())
