"""The masked low-rank operators, from torch alone: specification, schemas, public functions, backends."""
