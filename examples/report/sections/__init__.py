"""The parts of the story. Each file has STAGE (it appears when that has finished), TITLE, ASKS (what the report demands there) and
`write(run, part)`, which adds pictures, tables and findings to `part`. What a stage left out, because it was made by an older version
or had nothing to measure, is left out here too."""
