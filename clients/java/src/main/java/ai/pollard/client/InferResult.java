package ai.pollard.client;

import java.util.List;

/**
 * The answer of a model to tensors.
 *
 * @param model the model
 * @param version the revision that answered
 * @param id that of the request
 * @param outputs the outputs
 */
public record InferResult(String model, long version, String id, List<Tensor> outputs) {}
