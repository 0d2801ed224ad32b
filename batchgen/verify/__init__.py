"""`batchgen verify`: the output read again against its ledger, and the ledger against the job."""

from batchgen.verify.job import verify_job
from batchgen.verify.receipt import Receipt, encode_receipt, receipt_text, verdict, write_receipt

__all__ = [
    "Receipt",
    "encode_receipt",
    "receipt_text",
    "verdict",
    "verify_job",
    "write_receipt",
]
