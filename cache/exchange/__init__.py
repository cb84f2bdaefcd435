"""Exchange: captures as files that other tools read, and other tools' files as captures.

Out: `exporting.export_capture` writes one of the formats safetensors (with a Parquet index, for the Hugging Face hub),
datasets, npy and torch. In: `importing.import_source` takes a source: `vllm_dumps.VllmDumps`, `jsonl.JsonlSource` or
`own_export.OwnExport`. Files are refused where their headers lie, before anything is allocated for them.
"""
