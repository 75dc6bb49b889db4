#define SPARSAE_ISA sparsae_neon
#define SPARSAE_LANES 4
#define SPARSAE_NEON
#include "kernels.hpp"

const sparsae::Kernels& sparsae::kernels_neon() {
    static const Kernels kernels{"neon", SPARSAE_ISA::forward, SPARSAE_ISA::backward, SPARSAE_ISA::mlp_forward,
                                 SPARSAE_ISA::mlp_backward, SPARSAE_ISA::attention_forward,
                                 SPARSAE_ISA::attention_backward, SPARSAE_ISA::losses, SPARSAE_ISA::token,
                                 SPARSAE_ISA::multiply_add, SPARSAE_ISA::triad};
    return kernels;
}
