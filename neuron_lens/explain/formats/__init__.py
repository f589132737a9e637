"""File formats of other explanation tools, read and written: one kind of file a module, no torch.

    openai_records   OpenAI's neuron explainer and transformer debugger: the records
    openai_json      their JSON, read and written
    openai_paths     where OpenAI's public data lie, under any root
    openai_results   this library's results as OpenAI's records, and their windows back
    openai_scores    OpenAI's splits and scores, by its formulas
    delphi           EleutherAI Delphi's latent cache, explanations and scores
    neuronpedia      Neuronpedia's batch JSON (as SAEDashboard writes it)
    neuronpedia_export   Neuronpedia's bulk import folders

Everything here raises RequestError for a file that is not what it should be, naming file, line and field.
"""
